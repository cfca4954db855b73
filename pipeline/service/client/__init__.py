"""A client of a live service over HTTP: `Service`, for programs and for the command line, and `AsyncService` for event loops.

It shares the schemas of the routes, so both sides have one description of what is sent.
"""

from pipeline.service.client.connection import ServiceError
from pipeline.service.client.service import AsyncService, Service

__all__ = ["AsyncService", "Service", "ServiceError"]
