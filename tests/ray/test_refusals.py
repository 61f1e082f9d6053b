"""What the user can mend is said in one message, before anything is computed."""

from __future__ import annotations

import pytest

from .conftest import TINY, Antidote

pytestmark = pytest.mark.ray


def test_what_the_user_can_mend_is_one_message(antidote: Antidote) -> None:
    def refused(*words: str) -> str:
        code, _, err = antidote.run("run", *words, timeout=120)
        assert code == 1, err
        assert "Traceback" not in err
        return err

    assert "did you mean" in refused("roclip", "defense.evry=1").lower()
    text = refused("roclip", *TINY, "cluster.workers=64", "track.uri=none")
    assert "64 training workers" in text and "cluster.workers=1" in text
    assert "127.0.0.1:9" in refused("roclip", *TINY, "track.uri=http://127.0.0.1:9")
