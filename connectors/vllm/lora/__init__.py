"""LoRA adapters on pages of the engine's memory: any rank, as many as fit, loaded without stopping anybody.

The scheduler's side:
    admission.py    which content a request's adapter is, fetching it, when the request may run
    folders.py      what is in the folders that adapters are asked for by
    ledger.py       who may have pages, in which order
    paths.py        how a path names an adapter that only the cache knows

The workers' side:
    orders.py       carries out what the scheduler orders
    activation.py   the thread that copies adapters in
    filling.py      a payload onto pages
    pool.py         the pages, who is on them, and the tables the kernels read
    layout.py       where an adapter's matrices stand in its pages
    manager.py      vLLM's LoRA managers on the pool
    punica.py       what vLLM's LoRA layers call

    names.py        what the model calls the modules of adapters

The front end:
    resolver.py     model=NAME, for names that only the cache knows
    questions.py    asks the daemon what a name stands for
    reload.py       load_inplace, carried out once

plugin.py puts these in the place of vLLM's own, for engines that set lora_pool, and touches no other.
"""
