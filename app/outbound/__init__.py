"""Requests that the service makes itself, for inputs and webhooks; not to its own network. The core never imports it.
"""
