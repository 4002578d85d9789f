import sys
from pathlib import Path

# The searches made by hand; pytest's import mode adds no folders.
sys.path.insert(0, str(Path(__file__).parent))
