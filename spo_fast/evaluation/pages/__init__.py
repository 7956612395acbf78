"""What people read of a run: report.html, the page of a comparison, the model card."""
