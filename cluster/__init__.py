"""Where work runs: the Ray session, and pools of actors.

Ray's core reads its authentication mode once, when it is imported, so the mode is settled here, before any module of
this room imports it.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
