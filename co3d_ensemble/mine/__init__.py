"""MINE (Li et al., ICCV 2021): data sets of picture pairs, training, evaluation and inference."""
