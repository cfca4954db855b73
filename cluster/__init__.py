"""Execution on Ray: sessions, jobs on remote clusters, and pools of actors.

Ray reads its authentication mode once, at import. So this package sets the mode before any of its modules imports Ray.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
