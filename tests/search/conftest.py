import sys
from pathlib import Path

HERE = Path(__file__).parent
# The toy is imported by worker processes too, which know nothing of pytest's import mode.
sys.path.insert(0, str(HERE))
# Where the database server of our own is.
sys.path.append(str(HERE.parents[1] / "benchmarks"))
