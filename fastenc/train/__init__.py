"""Training: what the libraries' trainers do, with every text encoded once a batch and no padding.

``fastenc.train.setfit``: few-shot classifiers (Tunstall et al. 2022, arXiv:2209.11055).
"""
