// Sets the chosen colours before the page is drawn.
const theme = localStorage.getItem("ordain.theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
