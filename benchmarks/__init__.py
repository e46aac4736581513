"""One command per figure in the README: ``python -m benchmarks`` lists them."""
