from __future__ import annotations

from tests.quest_deploy.conftest import chain  # noqa: F401 - a fixture
