"""What a user sees while work goes on and after it: sizes in words, counts, a status line, figures."""
