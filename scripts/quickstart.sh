#!/usr/bin/env bash
# From nothing to a measured chat model, on the small sample this project makes itself: about four minutes on two cores.
#   sample -> tokenizer -> base model -> rows -> fine-tuned model -> exact match beside the base's
# Start it again after an interruption: what is there is used again. To begin anew, remove data/sample/*.jsonl,
# data/sample/corpus.txt, data/sft/sample.*, data/tokenizer/sample.*, checkpoints/pretrain/sample, checkpoints/sft/sample.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

base=checkpoints/pretrain/sample/final
run=checkpoints/sft/sample
step() {  # step HEADING OUTPUT COMMAND...: show the command and run it, unless OUTPUT is there (scripts write whole files)
  local heading=$1 output=$2
  shift 2
  printf '\n== %s\n   $ %s\n' "$heading" "$*"
  if [ -n "$output" ] && [ -e "$output" ]; then
    echo "   $output is there"
  else
    "$@"
  fi
}

echo "Commands below can be repeated one by one after: source .venv/bin/activate"
step "Sample: a text corpus, instruction rows, two held-out sets" data/sample/new_words.jsonl \
  python data/sample/make_sample.py
step "01 Tokenizer" data/tokenizer/sample.model \
  python scripts/01_train_tokenizer.py --input data/sample/corpus.txt --output_prefix data/tokenizer/sample --vocab_size 512
step "02 Base model" "$base" \
  python scripts/02_pretrain.py --config_path config/sample.json --tokenizer_path data/tokenizer/sample.model \
  --input data/sample/corpus.txt --output_dir "$base" --max_steps 4000 --batch_size 8 --sequence_length 128 \
  --learning_rate 4e-3 --weight_decay 0.05 --logging_steps 500 --seed 3
step "Prepare the rows" data/sft/sample.manifest.json \
  python scripts/prepare_sft_datasets.py --dataset sample
step "03 Fine-tune" "" \
  accelerate launch --mixed_precision bf16 scripts/03_sft.py --config_path config/sft_sample.json --resume_from_checkpoint
[ -z "$(find "$run" -maxdepth 1 -name '*model.safetensors' -newer "$run/eval/eval_results.json" 2>&1)" ] ||
  rm -f "$run/eval/eval_results.json"  # results of older weights
step "06 Evaluate base and fine-tuned model" "$run/eval/eval_results.json" \
  python scripts/06_eval_sft.py --model_path "$run" --baseline_path "$base" \
  --dataset_paths data/sample/heldout.jsonl data/sample/new_words.jsonl --max_new_tokens 24

python - "$run/eval/eval_results.json" <<'TABLE'
import json
import sys

found = json.load(open(sys.argv[1], encoding="utf-8"))


def cells(measure, sets):
    """A measure of each set with its 95 % interval."""
    return [f"{of[measure]:.3f} [{of['intervals'][measure][0]:.3f} {of['intervals'][measure][1]:.3f}]" for of in sets]


tuned = [found["datasets"][name] for name in ("heldout", "new_words")]
base, rule = [of["baseline"] for of in tuned], found["majority"]
rows = {"in brackets 95 % intervals": ["held-out prompts", "words of no row"],
        "exact match, fine-tuned": cells("exact_match", tuned),
        "exact match, base": cells("exact_match", base),
        "exact match, best rule": [f"{rule[key]:.3f}" for key in ("exact_match", "exact_match_new_words")],
        "answers that ended": cells("stopped", tuned)}
print()
for name, (held_out, new_words) in rows.items():
    print(f"{name:<28}{held_out:>22}{new_words:>22}")
TABLE
printf '\nModel: %s   Report: %s/eval/report.html\nMore of its answers: python scripts/06_eval_sft.py --gen_only\n' "$run" "$run"
