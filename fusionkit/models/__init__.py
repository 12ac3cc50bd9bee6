"""Fusion networks: one file a paper's network, built by name through `create_model`."""

from fusionkit.models.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
