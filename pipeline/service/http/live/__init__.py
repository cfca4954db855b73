"""The routes of a live service: uploads, arrivals, operations, log, tokens. `Live` is what they share; `routers` makes them.

The application only appends to the log; the working process finds there what is asked of it.
"""
