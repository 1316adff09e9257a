"""Generated code: prompts, completions, their tests in a sandbox, BLEU and CodeBLEU."""
