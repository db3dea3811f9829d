"""lm_eval on a directory of ours gives the result of our own per-token losses. Skipped where lm_eval is not installed
(`pip install lm_eval`; it is no requirement)."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import make_llama, sentences, write_rows

from common.chat import Encoded, load_chat
from common.evaluate import score
from common.model import load_model

pytest.importorskip("lm_eval")
TASK = """task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


@pytest.mark.parametrize("template", ["chatml", "instruct"])
def test_multiple_choice(tmp_path: Path, spm_unigram: str, template: str) -> None:
    """Guards against a tokenizer, a special token or a model that other tools read differently from us."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    chat = load_chat(spm_unigram, template)
    model_dir = make_llama(tmp_path / "model", len(chat.tokenizer), seed=2)
    chat.save(model_dir)
    lines = sentences(60)
    rows = [{"question": lines[5 * i], "choices": [lines[5 * i + k] for k in (1, 2, 3, 4)], "answer": i % 4}
            for i in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "choices.yaml").write_text(TASK.replace("FILE", str(path)))
    theirs = simple_evaluate(model="hf", model_args={"pretrained": model_dir, "dtype": "float32"}, tasks=["choices"],
                             task_manager=TaskManager(include_path=str(tmp_path)), device="cpu", batch_size=4,
                             log_samples=True, bootstrap_iters=0)

    examples = []
    for row in rows:
        for choice in row["choices"]:
            before, whole = map(chat.text_prompt_ids, (row["question"], f"{row['question']} {choice}"))  # with BOS
            assert whole[:len(before)] == before
            examples.append(Encoded(np.array(whole, np.int32), np.arange(len(whole)) >= len(before)))
    losses, _ = score(load_model(model_dir).eval(), examples, chat.pad_id, 8)
    ours = -np.array([x.sum() for x in losses]).reshape(12, 4)
    samples = sorted(theirs["samples"]["choices"], key=lambda sample: sample["doc_id"])
    likelihoods = np.array([[float(answer[0][0]) for answer in sample["resps"]] for sample in samples])
    assert np.abs(ours - likelihoods).max() < 1e-4
    targets, lengths = np.arange(12) % 4, np.array([[len(c) for c in row["choices"]] for row in rows])
    found = theirs["results"]["choices"]
    assert found["acc,none"] == (ours.argmax(1) == targets).mean()
    assert found["acc_norm,none"] == ((ours / lengths).argmax(1) == targets).mean()
    print(json.dumps({"acc": found["acc,none"], "acc_norm": found["acc_norm,none"],
                      "largest difference in nats": float(np.abs(ours - likelihoods).max())}))
