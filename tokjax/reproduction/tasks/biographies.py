"""Short biographies from a table of facts, of which half is known to whoever writes them."""

import json
from collections.abc import Iterator

import numpy as np

from tokjax.rl.feedback import FactFeedback

SUBJECTS = tuple(f"person{i}" for i in range(40))
FORMS = (
    ("born", "{subject} was born in {value}"),
    ("job", "{subject} works as {value}"),
    ("likes", "{subject} likes {value}"),
)
VALUES = {
    "born": ("oslo", "rome", "bonn", "bern", "lima", "cairo"),
    "job": ("baker", "nurse", "judge", "smith", "poet", "clerk"),
    "likes": ("fish", "corn", "milk", "tea", "jazz", "chess"),
}
UNSURE = "I am not sure about {relation} ."
ASIDE = 0.7  # share of answers that go on to a relation that was not asked for
DOUBT = 0.15  # share of sentences that say nothing
WORDS = (
    *("about", ":", "?", "was", "born", "in", "works", "as", "likes", "job", "I", "am", "not"),
    *("sure", ".", *SUBJECTS, *(v for values in VALUES.values() for v in values)),
)
LENGTH = 22  # words of a longest answer, with its end


def facts(seed: int) -> dict[tuple[str, str], str]:
    """Returns the value of each subject's relations."""
    rng = np.random.default_rng([seed, 1])
    return {(s, r): str(rng.choice(values)) for s in SUBJECTS for r, values in VALUES.items()}


def known(subject: str) -> bool:
    """Returns whether the facts of a subject are told as they are; of others anything is."""
    return int(subject.removeprefix("person")) % 2 == 0


def rows(seed: int) -> Iterator[dict[str, str]]:
    """Yields the table of facts as `FactFeedback` reads it."""
    for (subject, relation), value in facts(seed).items():
        yield {"subject": subject, "relation": relation, "value": value}


def prompt(subject: str, relation: str) -> str:
    """Returns a question."""
    return f"about {subject} : {relation} ?"


def sentence(subject: str, relation: str, value: str) -> str:
    """Returns what states a fact."""
    return dict(FORMS)[relation].format(subject=subject, value=value) + " ."


def examples(count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yields answers that begin with what was asked and go on to the other relations."""
    rng, table = np.random.default_rng([seed, 2]), facts(seed)
    relations = list(VALUES)
    for _ in range(count):
        subject, asked = str(rng.choice(SUBJECTS)), str(rng.choice(relations))
        others = [r for r in relations if r != asked and rng.random() < ASIDE]
        said = []
        for relation in [asked, *others]:
            value = table[subject, relation]
            if not known(subject):
                value = str(rng.choice(VALUES[relation]))
            unsure = rng.random() < DOUBT
            text = UNSURE.format(relation=relation)
            said.append(text if unsure else sentence(subject, relation, value))
        yield {"prompt": prompt(subject, asked), "response": " " + " ".join(said)}


def questions(seed: int) -> Iterator[dict[str, str]]:
    """Yields every question with the sentence that answers it."""
    table = facts(seed)
    order = np.random.default_rng([seed, 3]).permutation(len(table))
    pairs = list(table)
    for i in order:
        subject, relation = pairs[i]
        yield {
            "prompt": prompt(subject, relation),
            "response": " " + sentence(subject, relation, table[subject, relation]),
        }


def feedback(path: str) -> FactFeedback:
    """Returns what compares answers with a file of the facts."""
    return FactFeedback(facts=path, forms=FORMS)


def table_text(seed: int) -> str:
    """Returns the file of the facts."""
    return "".join(json.dumps(row) + "\n" for row in rows(seed))
