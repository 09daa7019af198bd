"""Score trained SAEs on held-out text, in the form that ships: reconstruction, firing, what a splice costs the LM."""
