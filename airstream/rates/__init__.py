"""This folder says how fast the hardware is: rates measured here, taken from a data sheet, or assumed.

It knows bytes and seconds, and each rate says where it comes from. It refuses to know models and plans. Read `facts`
first, then `measure`, which calls `disk`, `links` and `arithmetic`, then `saved` and `cards`.
"""
