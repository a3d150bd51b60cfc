"""Deployment: export, running, timing and comparing on the runtime that will serve the model."""
