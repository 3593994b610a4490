"""Checks of the generated tasks. --interactive asks you some."""

import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.script import ask, run_validation
from phase2_finetuning.project4_instruction_tuning.tasks import FAMILIES, Task, is_right, make_tasks

ALL = list(FAMILIES)


def prompts(*arguments) -> list[str]:
    return [task.prompt for task in make_tasks(*arguments)]


@settings(max_examples=200, deadline=None)
@given(family=st.sampled_from(ALL), seed=st.integers(0, 2**32))
def test_an_answer_is_right_and_another_is_wrong(family, seed):
    task = FAMILIES[family](Random(seed))
    assert task.family == family
    assert is_right(task, task.answer)
    assert is_right(task, f"\n {task.answer} \n")
    for wrong in ("", task.prompt, task.answer + ".", task.answer[:-1], f"The answer is {task.answer}"):
        assert not is_right(task, wrong)


def plus(prompt: str) -> str:
    a, _, b = prompt.removeprefix("What is ").removesuffix("?").split()
    return str(int(a) + int(b))


def minus(prompt: str) -> str:
    a, _, b = prompt.removeprefix("What is ").removesuffix("?").split()
    return str(int(a) - int(b))


SOLVED = [  # each family's answers, worked out from the prompt in another way
    ("add", plus),
    ("subtract", minus),
    ("multiply", lambda text: str(sum([int(text.split()[4][:-1])] * int(text.split()[2])))),
    ("reverse", lambda text: text.split(": ")[1][::-1]),
    ("count", lambda text: str(Counter(text.split(": ")[1])[text.split()[4]])),
    ("initials", lambda text: " ".join(word[:1] for word in text.split(": ")[1].split(" "))),
    ("join", lambda text: text.split(": ")[1].replace(" ", text.split()[2])),
    ("sort_numbers", lambda text: " ".join(sorted(text.split(": ")[1].split(), key=int))),
    ("sort_words", lambda text: " ".join(sorted(text.split(": ")[1].split()))),
    ("upper", lambda text: text.split(": ")[1].swapcase()),
    ("bullets", lambda text: "- " + text.split(": ")[1].replace(", ", "\n- ")),
]


@pytest.mark.parametrize(("family", "solve"), SOLVED, ids=[name for name, _ in SOLVED])
def test_answers_are_what_another_way_finds(family, solve):
    for task in make_tasks([family], 100, seed=1):
        assert task.answer == solve(task.prompt)


def test_units_are_those_of_the_world():
    seconds = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800}
    metres = {"mm": 1, "cm": 10, "m": 1000, "km": 1_000_000, "g": 1, "kg": 1000}  # and grams
    size = seconds | metres
    for task in make_tasks(["convert"], 300, seed=1):
        _, number, unit, _, other = task.prompt.removesuffix(".").split()
        answer, same = task.answer.split()
        assert same == other
        assert int(number) * size[unit] == int(answer) * size[other]


def test_json_may_be_written_in_any_way_but_must_be_the_object():
    (task,) = make_tasks(["json"], 1, seed=0)
    facts = json.loads(task.answer)
    assert is_right(task, json.dumps(dict(reversed(facts.items())), indent=4))
    assert not is_right(task, json.dumps(facts | {"age": str(facts["age"])}))
    assert not is_right(task, "[" * 100_000)
    assert not is_right(task, "```json\n" + task.answer + "\n```")


def test_no_prompt_is_both_trained_and_tested_on_whatever_the_seeds():
    trained = {prompt for seed in range(3) for prompt in prompts(ALL, 2600, seed, "train")}
    tested = prompts(ALL, 650, 99, "test")
    assert not trained & set(tested)
    assert len(set(tested)) == len(tested)


def test_families_come_in_turn_and_twice_where_named_twice():
    families = [task.family for task in make_tasks(["add", "join", "add"], 9, seed=0)]
    assert families == ["add", "join", "add"] * 3
    assert Counter(task.family for task in make_tasks(ALL, 13 * 5, seed=0)) == dict.fromkeys(ALL, 5)


def test_tasks_depend_on_the_seed_and_not_on_how_many_follow_or_what_else_is_asked():
    assert prompts(ALL, 40, 7) == prompts(ALL, 400, 7)[:40]
    assert prompts(["add", "join"], 10, 7)[::2] == prompts(["add"], 5, 7)
    assert prompts(["add"], 10, 7) != prompts(["add"], 10, 8)


def test_the_tasks_of_a_seed_stay_the_same():  # on every machine and in every run: checkpoints are compared
    assert prompts(["add", "count"], 4, 0) == [
        "What is 5 + 3?",
        "How many times is c in: a b d d b d b a b",
        "What is 17 + 29?",
        "How many times is a in: a b d d c a d",
    ]


def test_errors_name_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"family \(divide\) must be reasoning_gym:NAME or one of add, subtract"
    ):
        make_tasks(["divide"], 1, 0)
    with pytest.raises(ValueError, match=r"split \(all\) must be train or test"):
        make_tasks(ALL, 1, 0, "all")
    with pytest.raises(
        ValueError, match=r"number \(5000\) must be smaller: a family ran out of new test prompts"
    ):
        make_tasks(["multiply"], 5000, 0, "test")
    with pytest.raises(ValueError, match=r"number \(1\) must be at least 0, of at least one family \(0\)"):
        make_tasks([], 1, 0)


@pytest.mark.slow  # the library takes seconds to import
def test_reasoning_gym_brings_families_and_their_judges():
    name = "reasoning_gym:countdown"
    trained, tested = make_tasks([name], 4, 0), make_tasks([name], 4, 0, "test")
    assert not {task.prompt for task in trained} & {task.prompt for task in tested}
    for task in [*trained, *tested]:
        assert is_right(task, task.answer)
        assert not is_right(task, "1 + 1")
        assert is_right(Task(name, task.prompt, "", task.record), f"0 + {task.answer}") is False
    with pytest.raises(ValueError, match=r"family \(reasoning_gym:nothing\) must be one of"):
        make_tasks(["reasoning_gym:nothing"], 1, 0)


def interact() -> None:
    tasks = iter(make_tasks(ALL, 1000, seed=Random().randrange(2**32)))
    task = next(tasks)
    print(task.prompt)
    for line in ask("answer> "):
        print("right" if is_right(task, line.replace("\\n", "\n")) else f"no: {task.answer!r}")
        task = next(tasks)
        print(task.prompt)


if __name__ == "__main__":
    run_validation(__file__, interact)
