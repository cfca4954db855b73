"""What comes from outside before the log has it: uploads in parts.

The routes of `http/live` call this folder; `Operations` then appends the arrival.
"""
