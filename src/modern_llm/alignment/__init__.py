"""Layer 4: the stages (pretrain, SFT, DPO, verifier, eval) and the pipeline that chains them."""
