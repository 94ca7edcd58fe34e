"""Which tokens a step reads: windows, packing, order, mixtures, and the thread that reads ahead."""
