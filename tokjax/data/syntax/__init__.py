"""Parts of speech of a vocabulary: how often each token occurs with each syntactic tag."""
