"""The search: what varies (space), where a trial runs (trial), who proposes and who lives (search), who watches."""
