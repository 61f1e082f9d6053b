"""Plurals that no rule makes: one table for the captions an attack quotes or rewrites and for the nouns that label a captioned set."""

PLURALS: dict[str, str] = {
    **{"man": "men", "woman": "women", "person": "people", "child": "children", "foot": "feet", "tooth": "teeth"},
    **{"mouse": "mice", "goose": "geese", "ox": "oxen", "wolf": "wolves", "knife": "knives", "leaf": "leaves"},
    **{"loaf": "loaves", "calf": "calves"},
    **{word: word for word in ("sheep", "fish", "deer", "scissors", "broccoli", "bread")},
}


def irregular(word: str) -> str:
    """The plural of a word where the table has one that differs from the word: "women" of "woman"; "" for any other."""
    found = PLURALS.get(word.lower(), "")
    return "" if found == word.lower() else found
