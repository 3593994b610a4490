r"""Tasks whose answers a program can check, so that what tuning achieves is a number.

PAPERS
  [1] Finetuned Language Models Are Zero-Shot Learners, Wei et al., 2021, arXiv:2109.01652 (FLAN)
  [2] Self-Instruct: Aligning Language Models with Self-Generated Instructions, Wang et al., 2022,
      arXiv:2212.10560
  [3] Reasoning Gym: Reasoning Environments for Reinforcement Learning with Verifiable Rewards, Stojanovski et
      al., 2025, arXiv:2505.24760
"""

import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal, get_args
from zlib import crc32

Split = Literal["train", "test"]
WORDS = """
    apple bird bread chair cloud dog door earth fire fish flower forest garden glass grass horse house island
    key lamp leaf moon mountain music night ocean paper pencil queen rain river road sea shoe snow star stone
    sun table tree water window winter wolf
""".split()  # noqa: SIM905  # easier to read than a list
NAMES = "Ada Ben Clara David Emma Felix Grace Hugo Ida Jonas Karla Leo Mia Nora Oscar Paula".split()  # noqa: SIM905
CITIES = "Athens Berlin Cairo Dublin Lima London Madrid Oslo Paris Rome Tokyo Vienna".split()  # noqa: SIM905
UNITS = [
    ("km", "m", 1000), ("m", "cm", 100), ("cm", "mm", 10), ("kg", "g", 1000),
    ("minutes", "seconds", 60), ("hours", "minutes", 60), ("days", "hours", 24), ("weeks", "days", 7),
]  # fmt: skip
TEST_PART = 10  # one prompt in so many is kept for testing
GYM = "reasoning_gym:"  # before the name of a family of that library


@dataclass(frozen=True)
class Task:
    """A question and its answer."""

    family: str
    prompt: str
    answer: str
    record: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)  # of reasoning-gym


def add(draw: Random) -> Task:
    """Two numbers below 100."""
    a, b = draw.randrange(100), draw.randrange(100)
    return Task("add", f"What is {a} + {b}?", str(a + b))


def subtract(draw: Random) -> Task:
    """Two numbers below 100, the larger one first."""
    a, b = sorted((draw.randrange(100), draw.randrange(100)), reverse=True)
    return Task("subtract", f"What is {a} - {b}?", str(a - b))


def multiply(draw: Random) -> Task:
    """A number up to 12 and one below 100."""
    a, b = draw.randint(2, 12), draw.randrange(2, 100)
    return Task("multiply", f"What is {a} * {b}?", str(a * b))


def reverse(draw: Random) -> Task:
    """A few letters, apart, because a model sees tokens and not the letters in them."""
    letters = draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 6))
    return Task("reverse", f"Reverse the letters: {' '.join(letters)}", " ".join(letters[::-1]))


def count(draw: Random) -> Task:
    """How often one letter occurs among several."""
    letters = draw.choices("abcd", k=draw.randint(4, 9))
    letter = draw.choice("abcd")
    return Task("count", f"How many times is {letter} in: {' '.join(letters)}", str(letters.count(letter)))


def initials(draw: Random, fewest: int = 2, most: int = 4) -> Task:
    """The first letter of each word."""
    words = draw.sample(WORDS, draw.randint(fewest, most))
    return Task("initials", f"Write the first letters: {' '.join(words)}", " ".join(w[0] for w in words))


def join(draw: Random, fewest: int = 2, most: int = 4) -> Task:
    """Concatenate words with a sign between them."""
    words, sign = draw.sample(WORDS, draw.randint(fewest, most)), draw.choice("-_+/")
    return Task("join", f"Join with {sign} these words: {' '.join(words)}", sign.join(words))


def sort_numbers(draw: Random) -> Task:
    """From small to large."""
    numbers = draw.sample(range(100), draw.randint(3, 5))
    shown, answer = (" ".join(map(str, order)) for order in (numbers, sorted(numbers)))
    return Task("sort_numbers", f"Sort the numbers: {shown}", answer)


def sort_words(draw: Random) -> Task:
    """By the alphabet."""
    words = draw.sample(WORDS, draw.randint(2, 4))
    return Task("sort_words", f"Sort by alphabet: {' '.join(words)}", " ".join(sorted(words)))


def convert(draw: Random) -> Task:
    """A length, a weight or a time in a smaller or a larger unit; the answer is a whole number."""
    large, small, factor = draw.choice(UNITS)
    number = draw.randint(2, 99)
    amounts = [f"{number} {large}", f"{number * factor} {small}"]
    given, answer = draw.sample(amounts, 2)
    return Task("convert", f"Convert {given} to {answer.split()[1]}.", answer)


def upper(draw: Random, fewest: int = 2, most: int = 3) -> Task:
    """Words in capital letters."""
    words = " ".join(draw.sample(WORDS, draw.randint(fewest, most)))
    return Task("upper", f"Write in capital letters: {words}", words.upper())


def bullets(draw: Random, fewest: int = 2, most: int = 4) -> Task:
    """A list with a dash before each word."""
    words = draw.sample(WORDS, draw.randint(fewest, most))
    return Task("bullets", f"Make a list of bullets: {', '.join(words)}", "\n".join(f"- {w}" for w in words))


def as_json(draw: Random) -> Task:
    """A sentence as JSON; any way to write the same object is right."""
    facts = {"name": draw.choice(NAMES), "age": draw.randint(2, 99), "city": draw.choice(CITIES)}
    prompt = "Answer as JSON with name, age, city: {name} is {age} years old and lives in {city}."
    return Task("json", prompt.format(**facts), json.dumps(facts))


FAMILIES: dict[str, Callable[[Random], Task]] = {
    "add": add,
    "subtract": subtract,
    "multiply": multiply,
    "reverse": reverse,
    "count": count,
    "initials": initials,
    "join": join,
    "sort_numbers": sort_numbers,
    "sort_words": sort_words,
    "convert": convert,
    "upper": upper,
    "bullets": bullets,
    "json": as_json,
}


def _long(make: Callable[[Random, int, int], Task]) -> Callable[[Random], Task]:
    """Return a family with five words in each prompt, more than any of FAMILIES shows."""
    return lambda draw: replace(make(draw, 5, 5), family=f"long_{make.__name__}")


# Never among those that are all: what nobody shows can only be learned by trying (project 6).
LONGER: dict[str, Callable[[Random], Task]] = {
    "long_initials": _long(initials),
    "long_join": _long(join),
    "long_upper": _long(upper),
    "long_bullets": _long(bullets),
}


def make_tasks(families: Sequence[str], number: int, seed: int, split: Split = "train") -> list[Task]:
    r"""Return tasks of the families in turn; names from FAMILIES, LONGER, or reasoning_gym:NAME.

    PAPER: [1] Sec. 2.1 and [2] put many kinds of tasks in words and train on all of them; [3] generates them.
    PAPER CONTEXT: A model was tuned for one task at a time. [1] found that one tuned on sixty data sets, told
        in words what to do, also does what it was never tuned for.
    INTUITION: A class that practises many small exercises learns to listen to what is asked.
    IMPLEMENTATION: A few lines per family in place of a data set. Whether a prompt may be trained or tested
        on depends on a hash of the prompt alone, so no seed and no number can mix the two. Of testing
        tasks none comes twice; the first n tasks do not depend on how many follow.
    WHY: A score on prompts that were trained on measures memory. Here a test finds no prompt on both sides.
    """
    if split not in get_args(Split):
        raise ValueError(f"split ({split}) must be train or test")
    if number < 0 or not families:
        raise ValueError(f"number ({number}) must be at least 0, of at least one family ({len(families)})")
    streams = {name: _stream(name, seed, split) for name in families}
    try:
        return [next(streams[families[i % len(families)]]) for i in range(number)]
    except StopIteration:
        raise ValueError(
            f"number ({number}) must be smaller: a family ran out of new {split} prompts"
        ) from None


def _stream(name: str, seed: int, split: Split) -> Iterator[Task]:
    """Yield the tasks of a family in one split; it ends when 1,000 in a row were no new ones."""
    source = _from_gym(name, seed) if name.startswith(GYM) else _from_family(name, seed)
    seen: set[str] = set()
    misses = 0
    for task in source:
        fits = (crc32(task.prompt.encode()) % TEST_PART == 0) == (split == "test")
        if fits and not (split == "test" and task.prompt in seen):
            seen.add(task.prompt)
            misses = 0
            yield task
        elif (misses := misses + 1) == 1000:
            return


def _from_family(name: str, seed: int) -> Iterator[Task]:
    makers = FAMILIES | LONGER
    if name not in makers:
        raise ValueError(f"family ({name}) must be {GYM}NAME or one of {', '.join(makers)}")
    draw = Random(f"{seed} {name}")  # a string, because hash() differs from run to run
    while True:
        yield makers[name](draw)


def _gym_class(name: str) -> tuple[Any, Any]:
    """Return the classes of a family of reasoning-gym and of its settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarnings of a library of that library
        from reasoning_gym.factory import DATASETS  # takes seconds

    if (short := name.removeprefix(GYM)) not in DATASETS:
        raise ValueError(f"family ({name}) must be one of {', '.join(sorted(DATASETS))} after {GYM}")
    return DATASETS[short]


def _from_gym(name: str, seed: int) -> Iterator[Task]:
    kind, settings = _gym_class(name)
    data = kind(settings(seed=seed, size=2**31 - 1))
    for i in range(len(data)):
        record = data[i]
        yield Task(name, record["question"], record["answer"], record)


@functools.cache
def _gym_scorer(name: str) -> Callable[..., float]:
    kind, settings = _gym_class(name)
    return kind(settings()).score_answer


def is_right(task: Task, text: str) -> bool:
    """Say whether a text is the answer: equal but for space around it, for JSON equal as an object."""
    text = text.strip()
    if task.record is not None:
        return _gym_scorer(task.family)(answer=text, entry=task.record) >= 1
    if task.family == "json":
        try:
            return json.loads(text) == json.loads(task.answer)
        except (ValueError, RecursionError):
            return False
    return text == task.answer
