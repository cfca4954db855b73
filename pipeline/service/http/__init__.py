"""What a request passes through, and the routes of serving: door, problems, schemas, routers.

A router of another part of the service needs `require` (roles), `Problem` (errors) and nothing else of this folder.
"""
