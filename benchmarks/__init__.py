"""One command per figure in README.md and docs/figures.md: ``python -m benchmarks`` lists them."""
