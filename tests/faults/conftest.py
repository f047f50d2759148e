"""The workspaces that are damaged here are those of the other tests."""

from tests.quest_deploy.conftest import chain, mini_chain, mini_tiny, workspace

__all__ = ["chain", "mini_chain", "mini_tiny", "workspace"]
