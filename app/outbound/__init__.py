"""Requests that the service makes itself: inputs by reference and webhooks, guarded against addresses of its own network.
The core never imports it."""
