"""Find moments: embeddings of whole videos in a vector store, search, localisation, curation."""
