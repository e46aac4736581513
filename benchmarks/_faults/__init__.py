"""The kinds of faults that ``python -m benchmarks faults`` tries, and the warm process that tries them."""
