"""From a prompt to a text: ``tokenizer`` and ``template`` before the model, ``sampling`` behind it.

``loop`` runs prefill and decoding over ``rows``, ``speculative`` lets it take two steps at once,
``session`` keeps a conversation and its cache.
"""
