# make demo · make test · make soak · make bench · make lint. The first one that is called makes .venv and fills it.
PYTHON ?= python3
BIN := .venv/bin
DEMO := log/demo
READY := .venv/ready

.PHONY: demo test soak bench lint

demo: $(READY)
	rm -rf $(DEMO)
	$(BIN)/python fineweb.py --dataset python-docs --out data/python-docs
	$(BIN)/torchrun --standalone --nproc_per_node=2 train_gpt2.py --data_dir data/python-docs --log_dir $(DEMO) \
	    --n_layer 4 --n_head 4 --n_embd 128 --seq_len 256 --total_batch_size 2048 --micro_batch 4 \
	    --max_steps 300 --warmup_steps 20 --max_lr 4e-3 --min_lr 0 --val_every 50 --sample_every 150 --hella_every 0 \
	    --save_every 150 --sample_prompt "The function returns"
	$(BIN)/python sample.py --model $(DEMO) --prompt "Return a list of" --max_new_tokens 60
	$(BIN)/python plot_log.py $(DEMO) --out $(DEMO)/curves.png

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

soak: $(READY)
	$(BIN)/python -m pytest -m slow

bench: $(READY)
	$(BIN)/python bench/train_step.py

lint: $(READY)
	$(BIN)/ruff check .

$(READY): requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $(READY)
