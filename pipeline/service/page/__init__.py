"""The page of a live service: what arrived, what became of it and why, and forms for what an operator may do.

Rendered by the server, without scripts. `router` is used by the application.
"""

from pipeline.service.page.routes import BODIES, Page, router

__all__ = ["BODIES", "Page", "router"]
