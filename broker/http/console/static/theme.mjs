// Before anything is painted: the colours that were chosen here.
const theme = localStorage.getItem("ordain.theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
