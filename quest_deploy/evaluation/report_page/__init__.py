"""The page that shows a workspace: one HTML file that asks for nothing from elsewhere."""
