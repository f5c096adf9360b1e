"""This folder says what a forward pass needs of memory besides weights.

It knows configs, and modules on the meta device. Only `lm_head` computes with values, and changes how a model computes.
The folder refuses to know budgets and plans. Read `formulas` first, and `of_config`, where its sizes come from, then
`activations`, which uses `allocations` and `growth`, then `attention` and `lm_head`, which are details of kernels.
"""
