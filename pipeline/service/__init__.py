"""The live merge service: its log on disk, the worker that admits, merges and promotes experts, and the processes that answer.

- The state: `home` (`Home`, a service in a directory), `log` (`Log`), `worker` (`Worker`), `config` (`read_config`), `operations` (what
  operators ask for), `verify` (`verify`, `replay`). The pure part is `merge_service.live`.
- The door: `app.create_app` makes the ASGI application of a serving process, `http/` is what every route shares, `processes/` starts
  and restarts processes around one listening socket. Serving itself is in `workers.serving`, which knows no HTTP.
"""
