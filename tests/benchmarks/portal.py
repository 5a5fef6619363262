"""Twenty people at work in a portal, two heavy jobs beside them; see `tests/portal_load.py`.

python -m tests.benchmarks portal
"""

from tests.portal_load import measure

__all__ = ["measure"]
