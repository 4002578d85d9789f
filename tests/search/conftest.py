import sys
from pathlib import Path

# The toy is imported by worker processes too, which know nothing of pytest's import mode.
sys.path.insert(0, str(Path(__file__).parent))
