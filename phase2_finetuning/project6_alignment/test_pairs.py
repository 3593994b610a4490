"""Checks of pairs of answers, their batches, and the judge."""

import json
from pathlib import Path

import pytest
import torch

from common.script import run_validation
from phase1_foundation.project3_pretrain.distributed import World
from phase1_foundation.project3_pretrain.weights import load_model
from phase2_finetuning.project4_instruction_tuning.conversations import Message, Preference
from phase2_finetuning.project4_instruction_tuning.tasks import is_right, make_tasks
from phase2_finetuning.project4_instruction_tuning.templates import PLAIN
from phase2_finetuning.project6_alignment.config import SFT_MODEL, PairsConfig
from phase2_finetuning.project6_alignment.judging import Judge, compare
from phase2_finetuning.project6_alignment.pair_loader import PairLoader, fill_rows, split_pairs
from phase2_finetuning.project6_alignment.pairs import (
    Answer,
    Pair,
    encode_tasks,
    find_pairs,
    fingerprint,
    load_policy,
    preference_pairs,
    sample_answers,
    task_pairs,
)

PAIRS = [Pair([1, 2 + i % 7], [3] * (1 + i % 3), [4] * (1 + i % 4)) for i in range(23)]


@pytest.fixture(scope="session")
def taught(taught_file: Path):
    return (*load_model(taught_file), PLAIN)


# Answers and pairs


def test_answers_belong_to_their_tasks_and_are_judged_whole(taught):
    model, tokenizer, template = taught
    tasks = make_tasks(["count"], 70, 3)  # more than are answered at once
    answers = sample_answers(model, tokenizer, template, tasks, 3, 1.0, 8, seed=5)
    assert [len(group) for group in answers] == [3] * 70
    stop = template.stop(tokenizer)
    for task, group in zip(tasks, answers, strict=True):
        for answer in group:
            ended = answer.ids[-1] in stop
            assert tokenizer.decode(answer.ids[: -1 if ended else None]) == answer.text
            assert answer.right == (ended and is_right(task, answer.text))
    assert 0.2 < sum(answer.right for group in answers for answer in group) / 210 < 0.9
    again = sample_answers(model, tokenizer, template, tasks, 3, 1.0, 8, seed=5)
    assert again == answers
    assert sample_answers(model, tokenizer, template, tasks, 3, 1.0, 8, seed=6) != answers


def test_an_answer_that_was_cut_off_is_wrong(taught):
    model, tokenizer, template = taught
    for answer in sample_answers(model, tokenizer, template, make_tasks(["count"], 20, 3), 1, 1.0, 1):
        assert not answer[0].right  # no room for the mark that ends it


def test_each_wrong_answer_meets_a_right_one_to_the_same_prompt(taught):
    model, tokenizer, template = taught
    config = PairsConfig(families=["count"], tasks=60, samples=4, max_new_tokens=8)
    pairs, told = task_pairs(model, tokenizer, template, config, seed=1)
    tasks = make_tasks(["count"], 60, 1)
    prompts = {
        tuple(ids): task for ids, task in zip(encode_tasks(tokenizer, template, tasks), tasks, strict=True)
    }
    stop = template.stop(tokenizer)
    assert len(pairs) > 20
    assert f"{len(pairs)} pairs" in told
    for prompt, chosen, rejected in pairs:
        task = prompts[tuple(prompt)]
        assert chosen[-1] in stop
        assert is_right(task, tokenizer.decode(chosen[:-1]))
        ended = rejected[-1] in stop
        assert not ended or not is_right(task, tokenizer.decode(rejected[:-1]))
    assert len({(tuple(p.prompt), tuple(p.rejected)) for p in pairs}) == len(pairs)


def test_peoples_pairs_are_encoded_by_the_template_and_useless_ones_left_out(tokenizer):
    asked = [Message("user", "Sort by alphabet: sun moon")]
    preferences = [
        Preference(asked, "moon sun", "sun moon"),
        Preference(asked, "moon sun", "moon sun"),
        Preference(asked, "moon sun", "sun " * 100),
        Preference([*asked, Message("assistant", "sun"), Message("user", "Really?")], "moon sun", "yes"),
    ]
    pairs, told = preference_pairs(tokenizer, PLAIN, preferences, 96)
    assert told == "2 pairs; 2 left out: equal answers, or over 96 tokens"
    for pair, preference in zip(pairs, (preferences[0], preferences[3]), strict=True):
        for ids, text in ((pair.chosen, preference.chosen), (pair.rejected, preference.rejected)):
            whole = [*preference.prompt, Message("assistant", text)]
            assert pair.prompt + ids == PLAIN.encode(tokenizer, whole)[0]
            assert tokenizer.decode(ids[:-1]) == text


def test_pairs_are_made_once_and_anew_when_settings_or_weights_change(taught, tmp_path, monkeypatch, capsys):
    model, tokenizer, template = taught
    config = PairsConfig(families=["count"], tasks=40, max_new_tokens=8)
    path = tmp_path / "pairs.json"

    def find(config: PairsConfig = config, seed: int = 1) -> list[Pair]:
        return find_pairs(model, tokenizer, template, config, seed, path, World())

    first = find()
    written = path.read_bytes()
    assert find() == first
    assert path.read_bytes() == written
    assert find(PairsConfig(families=["count"], tasks=40, max_new_tokens=8, max_pairs=3)) == first[:3]
    assert path.read_bytes() == written
    assert find(seed=2) != first
    path.write_text(json.dumps({"settings": 1})[:9])  # damaged: made again
    assert find() == first
    assert path.read_bytes() == written
    assert "tasks with right and wrong ones give" in capsys.readouterr().out


def test_a_fingerprint_changes_with_any_weight(policy_file):
    model, _ = load_model(policy_file)
    before = fingerprint(model)
    with torch.no_grad():
        model.blocks[1].feed_forward.down.weight[3, 5] += 1e-3
    assert fingerprint(model) != before


def test_a_missing_model_names_the_command_that_makes_it(monkeypatch):
    from phase2_finetuning.project6_alignment import pairs

    monkeypatch.setattr(pairs, "SFT_MODEL", SFT_MODEL.with_name("none.pt"))
    with pytest.raises(
        FileNotFoundError, match=r"none.pt; make it with: .*project4_instruction_tuning/train.py$"
    ):
        load_policy(str(SFT_MODEL.with_name("none.pt")))


# Batches


def test_an_epoch_has_every_pair_once_and_another_order_each_time():
    loader = PairLoader(PAIRS[:20], 5, seed=3)
    epochs = [[loader.batch(step).tokens for step in range(4 * e, 4 * e + 4)] for e in range(2)]
    shown = [sorted(row.tolist() for batch in epoch for row in batch[:, 0, :2]) for epoch in epochs]
    assert shown[0] == shown[1] == sorted(pair.prompt for pair in PAIRS[:20])
    assert [b.tolist() for b in epochs[0]] != [b.tolist() for b in epochs[1]]
    assert torch.equal(loader.batch(6).tokens, PairLoader(PAIRS[:20], 5, seed=3).batch(6).tokens)


def test_rows_are_prompt_answer_and_filling_and_the_mask_names_the_answer():
    loader = PairLoader(PAIRS, 4)
    batch = loader.rows([0, 5])
    for i, number in enumerate((0, 5)):
        prompt, *answers = PAIRS[number]
        for k, answer in enumerate(answers):
            row, mask = batch.tokens[i, k], batch.mask[i, k]
            assert row[: len(prompt) + len(answer)].tolist() == prompt + answer
            assert row[mask].tolist() == answer
            assert not row[len(prompt) + len(answer) :].any()


def test_a_stranger_is_an_answer_to_the_next_prompt_in_turn_a_better_and_a_worse_one():
    loader = PairLoader(PAIRS, 4, strangers=True)
    batch = loader.rows([0, 1, 22])
    found = [batch.tokens[i, 2][batch.mask[i, 2]].tolist() for i in range(3)]
    assert found == [PAIRS[1].rejected, PAIRS[2].chosen, PAIRS[0].rejected]
    assert batch.tokens[1, 2, :2].tolist() == PAIRS[1].prompt


def test_a_stranger_never_makes_a_row_longer_than_any_pair():
    pairs = [Pair([1] * 9, [2], [3]), Pair([1], [2] * 4, [3] * 8)]
    batch = PairLoader(pairs, 2, strangers=True).rows([0, 1])
    assert batch.tokens.shape[2] == 10
    assert batch.tokens[0, 2][batch.mask[0, 2]].tolist() == [3]


def test_processes_share_each_batch():
    whole = PairLoader(PAIRS[:12], 6).batch(3)
    parts = [PairLoader(PAIRS[:12], 6, 0, False, rank, 3).batch(3) for rank in range(3)]
    assert [len(part.tokens) for part in parts] == [2, 2, 2]
    shown = [row[row > 0].tolist() for part in parts for row in part.tokens.flatten(0, 1)]
    assert shown == [row[row > 0].tolist() for row in whole.tokens.flatten(0, 1)]


def test_what_the_reference_thinks_stays_with_its_pair():
    loader = PairLoader(PAIRS, 5, seed=1)
    loader.measure(lambda batch: (batch.tokens * batch.mask).sum(dim=2))
    for step in range(8):
        batch = loader.batch(step)
        torch.testing.assert_close(batch.reference, (batch.tokens * batch.mask).sum(dim=2).float())


def test_prompts_that_are_held_back_are_not_trained_on():
    train, held = split_pairs(PAIRS, 0.3, 4)
    assert len(held) % 4 == 0
    assert not {tuple(p.prompt) for p in train} & {tuple(p.prompt) for p in held}
    assert all(pair in PAIRS for pair in train + held)
    with pytest.raises(ValueError, match=r"^pairs \(23\) must give at least batch_size \(16\) pairs"):
        split_pairs(PAIRS, 0.3, 16)
    with pytest.raises(ValueError, match=r"^batch_size \(24\) must be .* at most the 23 pairs$"):
        PairLoader(PAIRS, 24)


def test_filling_keeps_each_row_as_it_was():
    tokens, mask = fill_rows([([1, 2], [3]), ([4], [5, 6, 7])])
    assert tokens.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert mask.tolist() == [[False, False, True, False], [False, True, True, True]]


# The judge


def test_a_model_against_itself_wins_half(taught):
    model, tokenizer, template = taught
    judge = Judge(tokenizer, template, make_tasks(["count"], 40, 9, "test"), 1.0, 8, 3, samples=2)
    judge.compare_with(model)
    verdict = judge.judge(model)
    assert verdict.answers == 80
    assert verdict.win_rate == 0.5
    assert verdict.wins == verdict.losses == 0
    assert 0 < verdict.right < 1


def test_right_beats_wrong_and_all_else_is_a_tie():
    right, wrong = Answer([1, 2, 3], "a", True), Answer([1], "b", False)
    verdict = compare([[right, right], [wrong, right]], [[wrong, right], [wrong, wrong]])
    assert (verdict.right, verdict.wins, verdict.losses) == (0.75, 0.5, 0)
    assert verdict.win_rate == 0.75
    assert verdict.tokens == 2.5
    assert verdict.error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


if __name__ == "__main__":
    run_validation(__file__)
