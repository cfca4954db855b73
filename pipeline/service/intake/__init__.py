"""What comes from outside before the log has it: uploads in parts, and the tickets that experts come back with.

The routes of `http/live` call this folder; `Operations` then appends the arrival.
"""
