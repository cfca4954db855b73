"""Delivery of rows to MLflow: client, sink, the tracking store on this machine, its export, and the server of `temporal-merge
ui`.
"""
