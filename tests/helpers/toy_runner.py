"""runner.py over the toy pipeline."""

import sys

import runner

runner.PIPELINE = "toy_pipeline"
if __name__ == "__main__":
    sys.exit(runner.main())
