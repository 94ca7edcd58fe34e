"""The console command of Pippin; the toolkit itself lies beside it."""
