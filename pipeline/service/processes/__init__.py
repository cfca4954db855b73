"""The processes of a service on one machine: a supervisor that owns the socket, and serving processes that answer.

Used from outside: `supervisor` (`run`, `Child`), `child` (`when_orphaned`).
"""
