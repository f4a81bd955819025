"""What several tests share: servers, trees, files made by hand, stages of plain numbers."""
